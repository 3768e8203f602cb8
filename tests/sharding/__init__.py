"""Tests of meshes and of the rules that split dimensions over them."""
