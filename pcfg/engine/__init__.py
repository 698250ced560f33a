"""The compiled kernels below `pcfg.chart`; nobody needs to open this to use a grammar."""
