"""One module per command: arguments in, exit status out. The only modules, with the command line, that print."""
