"""Measuring: timing, roofline, results, expectations, profiles and notebook execution."""
