"""The effort of a start in tests: as users get it, but for the steps of a rotation, which take most of its time.

A rotation of 100 steps takes a quarter of a second on a tiny model, and most tests start a run. Processes that
`tests.ranks` starts have the effort of the process that starts them; other processes, such as those of torchrun, have
that of users, so a test that compares with one takes the fixture `users_effort`.
"""

from castlm.oneshot.options import EFFORTS, Effort

AS_USERS_GET_IT = EFFORTS["best"]
SHORT = AS_USERS_GET_IT._replace(rotation_iterations=4)


def use(effort: Effort) -> None:
    """Makes this the effort of every start of this process that asks for no other."""
    EFFORTS["best"] = effort
