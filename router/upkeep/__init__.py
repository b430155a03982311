"""What one router does for the fleet while it leads: duties, each with its own tick, and one election for all.

The duties are moving, releasing, retargeting, housekeeping, recording the history and sampling the fleet. Four tasks
are not duties, because every router performs them:

- end jobs at their deadline (`deadlines`): waiters are notified within `DEADLINE_TICK` even while no router leads, and
  the router that placed a job knows its deadline; taking a group of jobs in the store is exclusive anyway;
- ask running jobs to yield (`yielding`): the router that placed an urgent job sees first that no slot takes it, and the
  store asks only while that job waits;
- request a rewrite of the append-only file (`router.service.append_only_file`): a store that cannot write cannot elect
  a leader;
- return what was in flight under an ended session: each router checks when it renews its own session.
"""
