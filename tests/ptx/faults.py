"""What a program does wrong, and what the emulator cannot do."""


class Fault(Exception):
    """An error of the program: a GPU would fault, hang, or give a result that nobody can rely on."""


class Unknown(NotImplementedError):
    """Something the emulator does not know; the message names it."""
