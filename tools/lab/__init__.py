"""What the tests and the demo share: two hosts in one machine, guests, and the measuring of a move.

hosts   two network namespaces joined by a shaped link
guest   builds QEMU's command line, runs a guest
agent   talks to the agent in the guest; measures how long it was away
qmp     QEMU's monitor, and a stock migration to compare with

Only the standard library, Python 3.11.
"""
