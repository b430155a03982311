"""Comparisons of policies for people and programs: tables, JSON and one HTML page."""
