"""NAME.html: what has happened in a training, for a person to look at."""
