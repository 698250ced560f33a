"""The compiled kernels below `pcfg.chart`; nobody needs to open this to use a grammar."""

from pcfg import say_when_compiling

say_when_compiling()
