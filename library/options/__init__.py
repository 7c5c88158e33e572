"""The trainer's options: every one a row of `table`, read by `parse` into the rooms' values."""
