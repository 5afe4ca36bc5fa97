"""Speed and memory against other trainers, measured so that a doubter can repeat it: `python -m bench`."""
