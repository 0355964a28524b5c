# What `cmake --install` puts where: the programs, the plug-in in QEMU's folder, the unit and the
# configuration with the installed paths in them, manual pages and completion. debian/ packages
# exactly this. The configuration is in /etc whatever the prefix, because that is where presyncd
# looks (DESTDIR is heeded everywhere).
include(GNUInstallDirs)
set(PRESYNC_PLUGIN_FOLDER lib/${CMAKE_LIBRARY_ARCHITECTURE}/qemu)

install(TARGETS presync RUNTIME DESTINATION bin)
install(TARGETS presyncd RUNTIME DESTINATION sbin)
install(TARGETS presync_glue LIBRARY DESTINATION ${PRESYNC_PLUGIN_FOLDER})
install(FILES tools/presync/presync.bash-completion
  DESTINATION share/bash-completion/completions RENAME presync)
install(FILES tools/monitoring/presync.rules.yml tools/monitoring/presync-dashboard.json
  DESTINATION share/presync/monitoring)

# The prefix is known at installation only.
set(install_text [[
  function(presync_install_text from to)
    file(READ "@PROJECT_SOURCE_DIR@/${from}" text)
    string(REPLACE "/usr/local/bin/presyncd" "${CMAKE_INSTALL_PREFIX}/sbin/presyncd" text "${text}")
    string(REPLACE "/usr/local/lib/presync/presync_glue.so"
      "${CMAKE_INSTALL_PREFIX}/@PRESYNC_PLUGIN_FOLDER@/presync_glue.so" text "${text}")
    message(STATUS "Installing: $ENV{DESTDIR}${to}")
    file(WRITE "$ENV{DESTDIR}${to}" "${text}")
  endfunction()
  presync_install_text(tools/presyncd/presyncd.service
    "${CMAKE_INSTALL_PREFIX}/lib/systemd/system/presyncd.service")
  presync_install_text(tools/presyncd/presyncd.toml.example /etc/presync/presyncd.toml)
  presync_install_text(tools/presyncd/presync.sysusers
    "${CMAKE_INSTALL_PREFIX}/lib/sysusers.d/presync.conf")
  file(INSTALL "@PROJECT_SOURCE_DIR@/tools/presyncd/presync.tmpfiles"
    DESTINATION "${CMAKE_INSTALL_PREFIX}/lib/tmpfiles.d" RENAME presync.conf)
  execute_process(COMMAND "@PROJECT_SOURCE_DIR@/tools/man-pages"
    "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}/share/man" COMMAND_ERROR_IS_FATAL ANY)
  file(INSTALL "@PROJECT_SOURCE_DIR@/tools/libvirt/presync-hook"
    DESTINATION /etc/libvirt/hooks/qemu.d RENAME presync USE_SOURCE_PERMISSIONS)
  file(INSTALL "@PROJECT_SOURCE_DIR@/tools/libvirt/libvirt-hook.conf" DESTINATION /etc/presync)
  file(INSTALL "@PROJECT_SOURCE_DIR@/tools/libvirt/presync-libvirt.apparmor"
    DESTINATION /etc/apparmor.d/abstractions RENAME presync-libvirt)
  file(INSTALL "@PROJECT_SOURCE_DIR@/tools/libvirt/presync-libvirt.tmpfiles"
    DESTINATION "${CMAKE_INSTALL_PREFIX}/lib/tmpfiles.d" RENAME presync-libvirt.conf)
  file(INSTALL "@PROJECT_SOURCE_DIR@/tools/libvirt/presyncd-libvirt.conf"
    DESTINATION "${CMAKE_INSTALL_PREFIX}/lib/systemd/system/presyncd.service.d"
    RENAME libvirt.conf)
]])
string(CONFIGURE "${install_text}" install_text @ONLY)
install(CODE "${install_text}")
