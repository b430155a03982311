#!lua flags=allow-oom
-- Returns what a router took and could not forward to the arrivals. The router's session goes on.
--
-- KEYS[1] the arrivals' first list
-- KEYS[2..] in-flight lists
-- Returns the number of messages returned.
-- Safe to run twice: a list that was emptied has nothing to return.
--- @include "give_back"
local put_back = 0
for k = 2, #KEYS do put_back = put_back + give_back(KEYS[k], KEYS[1]) end
return put_back
