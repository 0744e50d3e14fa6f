"""`python -m bitskip_train` is `bitskip`."""

from bitskip.entry import main

if __name__ == "__main__":
    main(prog_name="bitskip")
