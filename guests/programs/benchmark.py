"""Calls, dictionaries, strings, sorting and big numbers, as often as the argument says."""

import sys


class Tree:
    def __init__(self, depth):
        self.children = [Tree(depth - 1) for _ in range(2)] if depth else []

    def count(self):
        return 1 + sum(child.count() for child in self.children)


def sieve(limit):
    is_prime = [True] * limit
    for number in range(2, limit):
        if is_prime[number]:
            for multiple in range(number * number, limit, number):
                is_prime[multiple] = False
    return sum(is_prime[2:])


def words(count):
    seen = {}
    state = 1
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        word = "word%d" % (state % 997)
        seen[word] = seen.get(word, 0) + 1
    ordered = sorted(seen.items(), key=lambda item: (-item[1], item[0]))
    return ",".join(word for word, _ in ordered[:3])


def power(exponent):
    return sum(int(digit) for digit in str(3**exponent))


for turn in range(int(sys.argv[1])):
    print(turn, Tree(10).count(), sieve(8000), words(5000), power(1500))
