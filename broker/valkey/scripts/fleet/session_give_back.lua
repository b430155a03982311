#!lua flags=allow-oom
-- Puts back what a router took and could not forward, under a session that goes on.
-- KEYS: the list to put back into, in-flight lists. Returns how many messages were put back.
-- Safe to run twice: a list that was put back is empty.
--- @include "give_back"
local put_back = 0
for k = 2, #KEYS do put_back = put_back + give_back(KEYS[k], KEYS[1]) end
return put_back
