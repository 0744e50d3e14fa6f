"""`python -m bitskip_cpu` is `bitskip-cpu`."""

from bitskip.entry import runtime

if __name__ == "__main__":
    runtime(prog_name="bitskip-cpu")
