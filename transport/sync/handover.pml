/* The handover between one source and one target: who may run the guest, whatever crashes and whatever is lost.
 * tests/handover_model has spin look at every state of it.
 *
 * Every transition names the function that it mirrors. A step of the model is what the code does without anything
 * in between that a crash or a message could tell apart; where something durable, a message or a QEMU's state
 * changes, a new step begins.
 *
 * The network: the control connection of a handover, and others for questions, so that a question may overtake
 * what is under way. A connection that is cut delivers some of what was under way, and either side notices when it
 * likes. A crash of a presyncd drops everything but its record; QEMUs outlive it.
 *
 * With NO_PERSON nothing may be left for a person to decide; that holds where no disk is lost and QEMU and presyncd
 * do not both die.
 *
 * Mutations: what is done in the wrong order, or believed too early. Each of them must be found:
 *   LATE_SOURCE_RECORD   Run is sent before the source's record says given-up
 *   LATE_TARGET_RECORD   the target runs the guest before its record says told-to-run
 *   RESUME_ON_SILENCE    a source in doubt resumes when nobody answers
 *   RESUME_ON_UNKNOWN    ... or when the target has no record
 *   ANSWER_IN_HAND       the target answers while a conversation still has the guest in hand
 *   ANSWER_TOLD          the target says "it runs here" when it was only told to run it
 *   DISCARD_FIRST        a QEMU that refused to run is ended before the record takes the order back
 *   TRUST_A_DEAD_QEMU    a QEMU that had ended before it was told to run is taken for one that may have run
 */

#ifndef CRASHES
#define CRASHES 2   /* of presyncds, in all */
#endif
#ifndef CUTS
#define CUTS 2      /* of the control connection */
#endif
#ifndef KILLS
#define KILLS 1     /* of a QEMU */
#endif
#ifndef LOSSES
#define LOSSES 1    /* of the target's record, with its disk */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2  /* handovers that are begun */
#endif

mtype = { none, preparing, given_up, moved, taken_back,      /* the source's record */
          waiting, told_to_run, ran, never_ran,              /* the target's */
          running, stopped, incoming, loaded, gone,          /* a QEMU */
          idle, begun, ready, still, load_sent, may_give_up, gave_up, run_sent, calling_off, doubt,
          told, does_run, refused, aborting,                 /* where a side is in its handover */
          Begin, Ready, Load, Loaded, Run, Running, NeverRan, Abort };

mtype s_record = none, t_record = none;    /* durable */
mtype s_vm = running, t_vm = gone;
mtype s_at = idle, t_at = idle;
bool s_up = true, t_up = true;
bool linked = false;                       /* the handover's connection */
bool s_open = false, t_open = false;       /* what `presync status` shows to a person */
bool guest_killed = false;
bool calm = false;
byte crashes = 0, cuts = 0, kills = 0, losses = 0, attempts = 0;

chan to_t = [3] of { mtype };
chan to_s = [3] of { mtype };

/* ControlChannel::Send over a connection that may be gone: then nobody gets it. */
inline to_target(message) { if :: linked && nfull(to_t) -> to_t!message :: !linked || full(to_t) -> skip fi }
inline to_source(message) { if :: linked && nfull(to_s) -> to_s!message :: !linked || full(to_s) -> skip fi }
inline forget_messages() { do :: to_t?_ :: to_s?_ :: empty(to_t) && empty(to_s) -> break od }
/* The connection ends: what was under way arrives up to some point. */
inline cut() {
  linked = false;
  if :: forget_messages() :: skip fi
}
inline resume() { if :: s_vm == stopped -> s_vm = running :: else fi }
inline end_waiting() { if :: t_vm == incoming || t_vm == loaded -> t_vm = gone :: else fi }

#ifdef ANSWER_TOLD
#define ANSWERS_TOLD true
#else
#define ANSWERS_TOLD false
#endif
#define T_IN_HAND (t_at == ready || t_at == may_give_up)   /* a conversation before the order to run */
#define S_LIVE (s_up && s_at != idle)

active proctype Source() {
  mtype m;
end:
  do
  /* SourceSession::Serve: the record; BeginHandover over a new connection (TargetService::AcquireSlot ends an older
   * conversation of the session first). */
  :: atomic { s_up && s_at == idle && s_record == none && s_vm == running && t_up && attempts < ATTEMPTS &&
              (t_at == idle || T_IN_HAND) ->
       attempts++;
       if :: T_IN_HAND -> end_waiting(); t_record = never_ran; t_at = idle :: else fi;
       forget_messages(); linked = true;
       s_record = preparing; s_at = begun; to_t!Begin }
  /* Handover::Rounds */
  :: atomic { s_up && s_at == begun && to_s?[Ready] -> to_s?m; s_at = ready }
  /* GuestSwitchover::Run */
  :: atomic { s_up && s_at == ready && s_vm == running -> s_vm = stopped; s_at = still }
  /* Handover::LoadAndCompare */
  :: atomic { s_up && s_at == still -> to_target(Load); s_at = load_sent }
  :: atomic { s_up && s_at == load_sent && to_s?[Loaded] -> to_s?m; s_at = may_give_up }
  /* Handover::Run: the record, before anything is said. */
#ifdef LATE_SOURCE_RECORD
  :: atomic { s_up && s_at == may_give_up -> to_target(Run); s_at = gave_up }
  :: atomic { s_up && s_at == gave_up -> s_record = given_up; s_at = run_sent }
#else
  :: atomic { s_up && s_at == may_give_up -> s_record = given_up; s_at = gave_up }
  :: atomic { s_up && s_at == may_give_up -> s_record = given_up; s_at = calling_off }  /* Append fails, yet is on disk */
  /* Handover::AfterGivingUp */
  :: atomic { s_up && s_at == gave_up -> to_target(Run); s_at = run_sent }
#endif
  :: atomic { s_up && s_at == run_sent && to_s?[Running] -> to_s?m; s_record = moved; s_at = idle; linked = false }
  :: atomic { s_up && s_at == run_sent && to_s?[NeverRan] -> to_s?m; s_record = taken_back; s_at = idle; linked = false }
  :: atomic { s_up && s_at == run_sent -> s_at = doubt; linked = false }    /* no answer in time */
  /* Handover::CallOff: whatever failed before the record. The guest first, then the target, then the record
   * (SourceSession::RemoveRecord). */
  :: atomic { s_up && (s_at == begun || s_at == ready || s_at == still || s_at == load_sent || s_at == may_give_up) ->
       s_at = calling_off }
  :: atomic { s_up && s_at == calling_off && s_vm == stopped -> s_vm = running }
  :: atomic { s_up && s_at == calling_off && s_vm != stopped -> to_target(Abort); s_record = none; s_at = idle;
       linked = false }
  /* SourceSession::ResolveDoubt, Recovery::SettleGivenUp: a question on a connection of its own, answered by
   * TargetService::Outcome, which first ends a conversation that has the guest in hand, and waits for one that has
   * the order to run. */
  :: atomic { s_up && s_at == idle && s_record == given_up -> s_at = doubt }
#ifdef ANSWER_IN_HAND
  :: atomic { s_up && s_at == doubt && t_up && !s_open ->
#else
  :: atomic { s_up && s_at == doubt && t_up && !s_open && (t_at == idle || T_IN_HAND) &&
              (t_record != told_to_run || t_open || ANSWERS_TOLD) ->  /* else it is asked again */
       if :: T_IN_HAND -> end_waiting(); t_record = never_ran; t_at = idle :: else fi;
#endif
       if
       :: t_record == ran || (t_record == told_to_run && ANSWERS_TOLD) -> s_record = moved; s_at = idle
       :: t_record == waiting ->
#ifndef ANSWER_IN_HAND
            end_waiting(); t_record = never_ran;
#endif
            s_record = taken_back; s_at = idle
       :: t_record == never_ran -> s_record = taken_back; s_at = idle
       :: else ->
#ifdef RESUME_ON_UNKNOWN
            s_record = taken_back; s_at = idle
#else
            s_open = true
#endif
       fi }
#ifdef RESUME_ON_SILENCE
  :: atomic { s_up && s_at == doubt && !t_up -> s_record = taken_back; s_at = idle }
#endif
  /* Recovery::Resume, SourceSession::ResumeHere */
  :: atomic { s_up && s_at == idle && (s_record == preparing || s_record == taken_back) -> resume(); s_record = none }
  /* Recovery::Moved, SourceSession::Settle */
  :: atomic { s_up && s_at == idle && s_record == moved ->
       if :: s_vm == stopped -> s_vm = gone :: else fi;
       s_record = none }
  /* RecoveryLoop's first pass comes with the rules above. */
  :: atomic { !s_up -> s_up = true }
  od
}

active proctype Target() {
  mtype m;
end:
  do
  /* TargetConversation::BeginHandover, after PreparePlace and its QEMU */
  :: atomic { t_up && t_at == idle && to_t?[Begin] -> to_t?m;
       if
       :: t_vm != running -> t_vm = incoming; t_record = waiting; t_at = ready; to_source(Ready)
       :: else -> linked = false                       /* QemuTargetHost::MakePlace refuses */
       fi }
  /* TargetConversation::Load */
  :: atomic { t_up && t_at == ready && to_t?[Load] -> to_t?m;
       if
       :: t_vm == incoming -> t_vm = loaded; t_at = may_give_up; to_source(Loaded)
       :: else -> t_at = aborting
       fi }
  /* TargetConversation::RunGuest: the record, before QEMU is told. */
#ifdef LATE_TARGET_RECORD
  :: atomic { t_up && t_at == may_give_up && to_t?[Run] -> to_t?m; t_at = told }
  :: atomic { t_up && t_at == told && t_vm == loaded -> t_vm = running; t_at = does_run }
#else
  :: atomic { t_up && t_at == may_give_up && to_t?[Run] -> to_t?m; t_record = told_to_run; t_at = told }
  :: atomic { t_up && t_at == told && t_vm == loaded -> t_vm = running; t_at = does_run }
  :: atomic { t_up && t_at == told && t_vm == loaded ->  /* it refuses: FAILED_PRECONDITION */
       t_at = refused;
#ifdef DISCARD_FIRST
       t_vm = gone
#else
       t_record = waiting
#endif
     }
  :: atomic { t_up && t_at == told && t_vm == gone ->    /* it had ended before it was told: the same */
#ifdef TRUST_A_DEAD_QEMU
       t_at = idle; linked = false
#else
       t_at = refused; t_record = waiting
#endif
     }
  :: atomic { t_up && t_at == refused -> end_waiting(); t_record = never_ran; to_source(NeverRan); t_at = idle;
       linked = false }
#endif
  :: atomic { t_up && t_at == does_run -> to_source(Running); t_record = ran; t_at = idle }
  /* TargetConversation::AbortHandover: on the source's word, or at the connection's end (Conversation::End). */
  :: atomic { t_up && T_IN_HAND && to_t?[Abort] -> to_t?m; t_at = aborting }
  :: atomic { t_up && T_IN_HAND && !linked && empty(to_t) -> t_at = aborting }
  :: atomic { t_up && T_IN_HAND -> t_at = aborting; linked = false }     /* silence, a bad message, a dead QEMU */
  :: atomic { t_up && t_at == aborting && (t_vm == incoming || t_vm == loaded) -> t_vm = gone }
  :: atomic { t_up && t_at == aborting && t_vm != incoming && t_vm != loaded ->
       t_record = never_ran; t_at = idle; linked = false }
  /* What comes when there is no conversation for it. */
  :: atomic { t_up && t_at == idle && (to_t?[Load] || to_t?[Run] || to_t?[Abort]) -> to_t?m }
  /* Recovery::SettleWaiting and SettleToldToRun, before presyncd listens and again and again. */
  :: atomic { t_up && t_at == idle && t_record == waiting && !t_open && (!linked || !S_LIVE) ->
       if
       :: t_vm == running -> t_open = true
       :: else -> end_waiting(); t_record = never_ran
       fi }
  :: atomic { t_up && t_at == idle && t_record == told_to_run && !t_open ->
       if
       :: t_vm == loaded -> t_vm = running; t_record = ran
       :: t_vm == running -> t_record = ran
       :: else -> t_open = true
       fi }
  :: atomic { !t_up ->                                 /* Daemon::Create: the first pass, then it listens */
       if
       :: t_record == waiting && t_vm != running -> end_waiting(); t_record = never_ran
       :: else
       fi;
       if :: t_vm == incoming -> t_vm = gone :: else fi;  /* QemuTargetHost::EndWaitingLeftovers */
       t_up = true }
  od
}

active proctype World() {
end:
  do
  :: atomic { !calm -> calm = true }          /* nothing more breaks */
  :: atomic { s_up && !calm && crashes < CRASHES -> crashes++; s_up = false; s_at = idle; cut() }
  :: atomic { t_up && !calm && crashes < CRASHES -> crashes++; t_up = false; t_at = idle; cut();
       do :: to_t?_ :: empty(to_t) -> break od }
  :: atomic { linked && !calm && cuts < CUTS -> cuts++; cut() }
  :: atomic { !calm && kills < KILLS && s_vm != gone -> kills++;
       if :: t_vm != running -> guest_killed = true :: else fi;
       s_vm = gone }
  :: atomic { !calm && kills < KILLS && t_vm != gone -> kills++;
       if :: t_vm == running || t_record == told_to_run -> guest_killed = true :: else fi;
       t_vm = gone }
  :: atomic { !calm && losses < LOSSES && !t_up && t_record != none -> losses++; t_record = none }
  od
}

/* Invariant 5, at every moment; and 4: nothing runs that was not given up. */
active proctype Watch() {
end:
  do
  :: atomic { s_vm == running && t_vm == running -> assert(false) }   /* two run */
  :: atomic { t_vm == running && s_record == none && s_at == idle && s_vm == stopped -> assert(false) }
  od
}

/* When nothing more happens, one guest runs; or it was killed; or it stands still at the source, where it can be
 * resumed, and a person is told. */
active proctype Verdict() {
end:
  atomic { timeout ->
#ifdef NO_PERSON
    assert(s_vm == running || t_vm == running || guest_killed);
    assert(!s_open && !t_open)
#else
    assert(s_vm == running || t_vm == running || guest_killed || (s_open && s_vm == stopped))
#endif
  }
}
