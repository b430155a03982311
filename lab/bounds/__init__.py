"""What no policy can undercut: the least cost of answering all in time, and the least score with whole devices."""
