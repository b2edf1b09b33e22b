// The kernels of one step, in a loop over the steps of a case whose products with the recurrent weights are given (the
// same at every step): what is left of a layer without its GEMMs.
#include "pointwise.cu"
#include "program.h"

namespace {

using fastrnn::CellKind;
using fastrnn::StepTable;
using fastrnn::Storage;
using program::Case;

void* optional(const Case& c, const char* name) { return c.has(name) ? c.array<void>(name) : nullptr; }

StepTable table_of(const Case& c) {
  StepTable table;
  table.steps = c.number("steps");
  table.batch = c.number("batch");
  table.total = table.steps * table.batch;
  table.batch_stride = 1;
  table.lengths = static_cast<const int64_t*>(optional(c, "lengths"));
  table.reset = static_cast<const bool*>(optional(c, "reset"));
  table.reset_step_stride = table.batch;
  table.reset_batch_stride = 1;
  table.directions = c.number("directions");
  return table;
}

void at_step(StepTable& table, int64_t s, bool against) {
  for (int d = 0; d < table.directions; ++d) {
    const int64_t t = (d == 0) != against ? s : table.steps - 1 - s, before = d == 0 ? t - 1 : t + 1;
    table.step[d] = {t, table.batch, table.batch, t * table.batch, before * table.batch};
  }
}

void forward(const Case& c) {
  fastrnn::StepForward p;
  p.table = table_of(c);
  p.units = p.outputs = c.number("units");
  p.save = true;
  p.gates = c.array<void>("gates");
  p.gates_stride = c.number("columns");
  p.recurrent = c.array<void>("recurrent");
  p.h0 = optional(c, "h0");
  p.c0 = optional(c, "c0");
  p.hidden = c.array<void>("hidden");
  p.state = c.array<void>("state");
  p.output = c.array<void>("output");
  p.h_n = c.array<void>("h_n");
  p.c_n = optional(c, "c_n");
  for (int64_t s = 0; s < p.table.steps; ++s) {
    at_step(p.table, s, false);
    fastrnn::forward_step(static_cast<CellKind>(c.number("kind")), Storage::kFloat, p, nullptr);
  }
}

void backward(const Case& c) {
  fastrnn::StepBackward p;
  p.table = table_of(c);
  p.units = p.outputs = c.number("units");
  p.reserve = c.array<void>("gates");
  p.reserve_stride = c.number("columns");
  p.output = c.array<void>("output");
  p.h0 = optional(c, "h0");
  p.c0 = optional(c, "c0");
  p.grad_output = c.array<void>("grad_output");
  p.carry = c.array<void>("carry");
  p.grad_gates = c.array<void>("grad_gates");
  p.grad_recurrent = optional(c, "grad_recurrent");
  p.step_gates = c.array<void>("step_gates");
  p.grad_first = c.array<void>("grad_first");
  p.previous = c.array<void>("previous");
  for (int64_t s = 0; s < p.table.steps; ++s) {
    if (s > 0) p.product = c.array<void>("product");
    at_step(p.table, s, true);
    fastrnn::backward_step(static_cast<CellKind>(c.number("kind")), Storage::kFloat, p, nullptr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return program::run(argc, argv, {{"layer", [](const Case& c) {
                                      forward(c);
                                      backward(c);
                                    }}});
}
