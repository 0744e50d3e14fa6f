"""`python -m bitskip_experiments` is `bitskip`."""

from bitskip.entry import main

if __name__ == "__main__":
    main(prog_name="bitskip")
