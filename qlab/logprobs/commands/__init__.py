"""One subcommand of ``python -m qlab.logprobs`` per file: a function ``main``; ``__main__`` lists the files."""
