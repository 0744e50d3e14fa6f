"""`python -m bitskip_cpu` is `bitskip-cpu`."""

from bitskip_cpu.cli import main

main(prog_name="bitskip-cpu")
