"""Measurements that stand behind the figures in README and docs."""
