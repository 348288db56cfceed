"""Schedules, samplers, guidance, noise and step caches: functions of a velocity, whatever the model."""
