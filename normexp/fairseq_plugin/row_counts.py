"""How many rows a matrix product of varying batches should have."""


def rounded_up(count: int) -> int:
    """Return the smallest number from `count` on of which there are 16 between powers of two.

    oneDNN, which torch multiplies bfloat16 by on a CPU, compiles and keeps code for every shape
    that it meets: half a gigabyte of it after some hundred of fairseq's batches, each of another
    number of tokens. Rows of zeros, a thirty-second of the rows on average, cost less.
    """
    step = 1 << max(0, count.bit_length() - 5)
    return -(-count // step) * step
