#pragma once

#include <pybind11/pybind11.h>

void pgolf_bind_ngram(pybind11::module_& module);
