// Text that others wrote, made fit for a log and a terminal.
#pragma once

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"

namespace presync {

// What is kept of somebody's words; "..." says that there was more.
inline constexpr size_t kMostPrintableBytes = 2000;

// What a peer, a QEMU, libvirt or a certificate says, on one line and without effect on a terminal:
// control characters (C0, DEL, C1), separators of lines, and what turns the direction of writing or
// can't be seen is escaped ("\n", "\x1b", "\u202e"), as are bytes that are no UTF-8. What is
// printable already stays as it is, so doing it twice is in order.
std::string PrintableText(absl::string_view text, size_t most_bytes = kMostPrintableBytes);

}  // namespace presync
