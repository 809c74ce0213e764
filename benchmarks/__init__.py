"""What serving through a tunnel costs, measured against the alternatives. See ``benchmarks/README.md``."""
