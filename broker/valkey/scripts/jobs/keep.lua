#!lua flags=allow-oom
-- Keeps what there is of generations that are not finished, for who runs their jobs next.
--
-- KEYS[1..] each job's record
-- ARGV[1..] a map for each job: the `token` of its claim, the `text` with what belongs to it, and its `parts`
-- Returns for each job 1 if its claim is still held, else 0.
-- Safe to run twice: it writes the same.
--- @include "final"
local kept = {}
for n, job in ipairs(KEYS) do
  local one = cmsgpack.unpack(ARGV[n])
  local mine = ours(job, one.token)
  if mine then redis.call('HSET', job, 'generation', one.text, 'parts', one.parts) end
  kept[n] = mine and 1 or 0
end
return kept
