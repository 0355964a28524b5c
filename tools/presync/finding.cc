#include <utility>

#include "tools/presync/doctor.h"

namespace presync {

using Level = Finding::Level;

Finding Good(std::string what, std::string detail) {
  return {Level::kGood, std::move(what), std::move(detail), ""};
}
Finding Note(std::string what, std::string detail, std::string remedy) {
  return {Level::kNote, std::move(what), std::move(detail), std::move(remedy)};
}
Finding Bad(std::string what, std::string detail, std::string remedy) {
  return {Level::kProblem, std::move(what), std::move(detail), std::move(remedy)};
}

}  // namespace presync
