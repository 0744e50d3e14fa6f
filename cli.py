"""`python cli.py VERB` is `bitskip VERB`, from a clone that is not installed."""

from bitskip.entry import main

if __name__ == "__main__":
    main(prog_name="cli.py")
