-- now: the server's time in seconds. No host's clock decides who holds a claim or whether a deadline has passed.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
