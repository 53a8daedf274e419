"""Deltas: portable, reversible, inspectable changes to a model, and everything that is done with them once
written.

``lowrank`` is the change itself, ``build`` makes one from factors, ``manifest`` says what it is, ``files``
saves and loads it, ``gain`` measures how much of it survives rounding, ``merge`` makes it permanent, ``lora``
exports it, ``card`` tells people about it.
"""
