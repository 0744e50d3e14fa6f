"""Imported by the process that verbs are forked from: kernels are loaded once for all of them."""

from bitskip_cpu.compiling import warmup

warmup()
