"""Parts of the command line: option types, shared options, and the one place for errors."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bitskip_cpu.model import Model

MODEL = click.argument("model", required=False)
THREADS = click.option(
    "--threads", "-t", type=click.IntRange(1), help="Default: the physical cores."
)

KV_CACHES = ["float32", "float16"]  # bitskip_ref.cache has them, with NumPy, which takes long
KV_CACHE = click.option(
    "--kv-cache", type=click.Choice(KV_CACHES), default="float32", show_default=True,
    help="Keys and values: float16 takes half the memory and rounds them.",
)  # fmt: skip


def load_model(
    model: str | None, threads: int | None, quiet: bool = False, kv_cache: str = "float32"
) -> Model:
    """Load a MODEL argument, compiling the kernels first if this machine never has."""
    import bitskip_cpu
    from bitskip_cpu.progress import prepare

    prepare(quiet)
    return bitskip_cpu.load(model, threads, kv_cache=kv_cache)


class ErrorLine(click.ClickException):
    """An error as one line on standard error; exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"error: {' '.join(self.message.splitlines())}", file, err=True)


class UsageLine(ErrorLine):
    """The same for a command line that asks for something impossible; exit code 2."""

    exit_code = 2


class Verbs(click.Group):
    """A group whose verbs' errors become one line: exit code 2 for usage, 1 for all else."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. A closed pipe is left to click, which ends quietly."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise UsageLine(error.format_message()) from None
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            named = error.filename is not None and error.strerror
            text = f"{error.filename}: {error.strerror}" if named else str(error)
            raise ErrorLine(text) from None
        except (ValueError, RuntimeError) as error:
            raise ErrorLine(str(error)) from None
        except MemoryError:
            raise ErrorLine("not enough memory") from None


class NumberOrWord(click.ParamType):
    """A whole number, or a word that `bitskip_cpu.model.Model` knows."""

    name = "N|WORD"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """A number as int, all else as it is."""
        try:
            return int(value)
        except ValueError:
            return str(value)


class Numbers(click.ParamType):
    """Whole numbers separated by commas, none below a least one."""

    name = "N,N,..."

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        """The numbers in the order given, without repeats."""
        try:
            numbers = list(dict.fromkeys(int(part) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers like 1,2", param, ctx)
        if min(numbers) < self.least:
            self.fail(f"{min(numbers)} is below {self.least}", param, ctx)
        return numbers


class Choices(click.ParamType):
    """Some of the allowed words, separated by commas."""

    name = "WORD,..."

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = allowed

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        """The words in the order given, without repeats."""
        words = list(dict.fromkeys(part.strip() for part in str(value).split(",")))
        for word in words:
            if word not in self.allowed:
                self.fail(f"{word!r} is not one of {', '.join(self.allowed)}", param, ctx)
        return words


class Pair(click.ParamType):
    """Two whole numbers from 1 up, as 512,64."""

    name = "P,N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """The two numbers."""
        try:
            first, second = (int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a pair of whole numbers like 512,64", param, ctx)
        if min(first, second) < 1:
            self.fail(f"{min(first, second)} is below 1", param, ctx)
        return first, second
