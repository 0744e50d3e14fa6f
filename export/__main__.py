"""`python -m bitskip_export` is `bitskip`."""

from bitskip.entry import main

if __name__ == "__main__":
    main(prog_name="bitskip")
