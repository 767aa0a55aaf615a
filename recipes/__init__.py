"""What is not the paper's, or not the core's. Run them from the project's folder: python -m recipes.NAME"""
import plumbing  # before torch, which reads a variable that it sets
