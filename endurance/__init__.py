"""Tests of endurance, which run for minutes. From the project's folder: python -m endurance.NAME"""
import plumbing  # before torch, which reads a variable that it sets
