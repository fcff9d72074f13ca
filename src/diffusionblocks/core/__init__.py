"""A network as blocks: conversion, the model, files."""
