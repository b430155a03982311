"""What one router does for the fleet while it leads: duties, each with its own tick, and one election for all.

The duties are moving, releasing, retargeting, housekeeping and recording the history. Every router does the following
itself:

- ending jobs at their deadline (`deadlines`): waiters are notified within `DEADLINE_TICK`, even while no router leads,
and the router that placed a job knows its deadline; taking a group of jobs in the store is exclusive anyway;
- having the append-only file rewritten (`store.AppendOnlyFile`): a store that cannot write cannot elect a leader;
- returning what was in flight under an ended session: each router checks when it renews its own session.
"""
