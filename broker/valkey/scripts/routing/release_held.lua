#!lua flags=allow-oom
-- forward.lua for jobs that were held: they are there already, and a full server lets them go.
-- KEYS, ARGV and answer: those of forward.lua.
-- Safe to run twice: a job whose record is not in the state given is not held any more.
local was = 'held'
--- @include "forward"
