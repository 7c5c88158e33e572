"""What a training takes, found out without taking it: memory, time, disk."""
