"""A run as it goes: what it says (`events`), what it keeps (`journal`) and what it shows (`progress`, `log`)."""
