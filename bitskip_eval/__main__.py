"""lm-eval's own program, which knows bitskip: `python -m bitskip_eval run --model bitskip ...`."""

from lm_eval.__main__ import cli_evaluate

import bitskip_eval.adapter  # noqa: F401  # registers the model

if __name__ == "__main__":
    cli_evaluate()
