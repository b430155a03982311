#!lua flags=allow-oom
-- Forwards jobs that were held: they are there already, and a full server lets them go.
--
-- KEYS and ARGV: those of forward.lua.
-- Returns what forward.lua returns.
-- Safe to run twice: a job whose record is not in the state given is not held any more.
local was = 'held'
--- @include "forward"
