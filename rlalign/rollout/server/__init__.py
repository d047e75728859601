"""The rollout server: one engine that outlives the jobs which sample from it."""
