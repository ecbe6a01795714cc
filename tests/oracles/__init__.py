"""Slow, plain transcriptions of the paper to hold the code against."""
