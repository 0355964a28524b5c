// presyncd's answers as a person reads them.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace presync {

std::string RenderGuest(const nlohmann::json& guest);      // some lines
std::string RenderGuestLine(const nlohmann::json& guest);  // one line
std::string RenderStatus(const nlohmann::json& status);
std::string RenderLaunch(const nlohmann::json& report);
std::string RenderSettled(const nlohmann::json& answer);
std::string RenderVerify(const nlohmann::json& report);
std::string RenderStopped(const nlohmann::json& answer);

// Rewrites the current line of a terminal; without a terminal prints only the last one.
void ShowProgress(const std::string& line, bool last);
void ClearScreen();

}  // namespace presync
