"""From files to batches, addressed by position."""
