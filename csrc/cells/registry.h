// The one list of cells on the C++ side; fastrnn/reference.py has the one on the Python side.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "vanilla.h"

#ifndef FASTRNN_CELLS  // or those that a test is about
#define FASTRNN_CELLS(X)       \
  X(::fastrnn::Lstm)           \
  X(::fastrnn::Gru)            \
  X(::fastrnn::GruResetBefore) \
  X(::fastrnn::RnnTanh)        \
  X(::fastrnn::RnnRelu)
#endif
