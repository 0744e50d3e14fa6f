"""The one error policy: a verb raises, the user reads one line with value, rule and remedy.

Exit codes: 2 for a command line that cannot be read, 1 for all else, 130 after Ctrl-C, 143 after
SIGTERM. What is none of the errors below is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from bitskip.signals import Terminated, exit_code
from bitskip.terminal import visible

# Module of a library that not every installation has -> the extra that brings it.
EXTRAS = {
    "torch": "train", "tensorboard": "train", "datasets": "hub", "huggingface_hub": "hub",
    "onnx": "onnx", "onnxruntime": "onnx", "matplotlib": "plot", "optuna": "experiments",
    "transformers": "experiments", "gguf": "gguf", "jinja2": "chat",
    "lm_eval": "eval", "starlette": "serve", "uvicorn": "serve",
}  # fmt: skip
NO_THREADS = ("can't start new thread", "ThreadPoolBuildError")
LONGEST = 2000  # characters of an error line; names from files may have any length


class ErrorLine(click.ClickException):
    """An error as one line on standard error; exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print the line."""
        text = visible(" ".join(self.message.splitlines()))
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        click.echo(f"error: {text}", file, err=True)


class UsageLine(ErrorLine):
    """The same for a command line that cannot be read; exit code 2."""

    exit_code = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into an ErrorLine. A closed pipe is click's: it ends quietly."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort, click.exceptions.NoArgsIsHelpError, ErrorLine):
        raise
    except click.UsageError as error:
        raise UsageLine(_usage(error)) from None
    except click.ClickException as error:
        raise ErrorLine(error.format_message()) from None
    except (KeyboardInterrupt, Terminated) as error:
        click.echo("interrupted" if isinstance(error, KeyboardInterrupt) else "ended", err=True)
        raise click.exceptions.Exit(exit_code(error)) from None
    except ImportError as error:
        raise ErrorLine(not_installed(error)) from None
    except MemoryError as error:
        raise ErrorLine(f"not enough memory {error}".strip()) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        named = error.filename is not None and error.strerror
        raise ErrorLine(f"{error.filename}: {error.strerror}" if named else str(error)) from None
    except (ValueError, RuntimeError) as error:
        raise ErrorLine(_with_remedy(str(error))) from None
    except BaseException as error:  # a panic of a library in Rust is no Exception, nor ours
        if type(error).__name__ != "PanicException":
            raise
        raise ErrorLine(_with_remedy(str(error))) from None


def _with_remedy(text: str) -> str:
    """What Python and libraries say of threads that cannot start, and what helps."""
    if any(words in text for words in NO_THREADS):
        return f"no thread can be started ({text}): raise the limit of processes (ulimit -u)"
    return text


def not_installed(error: ImportError) -> str:
    """What lacks, and the line that installs it. Raises the error again if that is ours."""
    from bitskip_ref.excerpt import one_line

    name = (error.name or "").partition(".")[0]
    if name.startswith("bitskip"):
        raise error
    if not name:
        return one_line(error)
    extra = EXTRAS.get(name)
    wanted = f"bitskip[{extra}]" if extra else "bitskip"
    remedy = f'pip install "{wanted}"'
    if isinstance(error, ModuleNotFoundError) and not _installed(name):
        return f"{name} is not installed: {remedy}"
    reason = one_line(error)
    return f"{name} is installed but cannot be imported ({reason}): {remedy} --force-reinstall"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # hidden, or half imported
        return False


def _usage(error: click.UsageError) -> str:
    """The message; where it names no remedy, where to look for one."""
    text = error.format_message().rstrip()
    bare = isinstance(error, click.NoSuchOption | click.MissingParameter)
    if bare and not getattr(error, "possibilities", None) and error.ctx is not None:
        text += f" See {error.ctx.command_path} -h."
    return text
