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
 * Beside presync act people and services, ACTS times in all: somebody resumes (`cont`) the guest that the source gave
 * up, or the one that waits; moves it away by QEMU's own migration; pauses it; starts the source's QEMU again after
 * it has ended; and says where it runs, right or wrong. Wrong only where the other host can be asked: a person who
 * says what nobody can contradict is believed.
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
 *   RESUME_UNMARKED      what somebody else's migration left is resumed, for it stands as ours would leave it
 *   NO_HOLD              a guest that was given up and that somebody resumed is not stopped again
 *   KILL_BY_STATE        a guest that moved is ended only where it stands as a handover left it
 *   NO_TOMBSTONE         whoever starts guests is not told that this one has left
 *   STALE_PASS           recovery acts upon what it read before
 *   STALE_WORD           a person's word is acted upon though the matter was settled meanwhile
 *   WORD_UNASKED         ... or without asking the other host
 *   SEEN_YET_NEVER_RAN   a waiting guest that was seen to run is said never to have run
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
#ifndef ACTS
#define ACTS 2      /* of people and services */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2  /* handovers that are begun */
#endif

mtype = { none, preparing, given_up, moved, taken_back,      /* the source's record */
          waiting, told_to_run, ran, never_ran, ran_untold,  /* the target's */
          running, stopped, incoming, loaded, gone,          /* a QEMU */
          left, paused,                                      /* ... moved by QEMU's own migration; by its operator */
          here, there,                                       /* a person's word */
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
bool elsewhere = false;                    /* it runs on a third host */
bool s_left = false;                       /* the note that it left: transport/sync/departures.h */
bool s_by_hand = false, t_by_hand = false; /* somebody resumed it who must not have */
bool t_seen = false;                       /* ... and presyncd saw that */
bool seen_never_ran = false;               /* never_ran was written of a guest that was seen to run */
mtype t_read = none;                       /* what a pass of recovery read at the target */
mtype s_word = none;                       /* what a person typed at the source */
bool calm = false;
byte crashes = 0, cuts = 0, kills = 0, losses = 0, attempts = 0, acts = 0, reads = 0;

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
/* QemuSourceGuest::Resume: only what bears presync's mark. */
#ifdef RESUME_UNMARKED
#define IS_OURS (s_vm == stopped || s_vm == left)
#else
#define IS_OURS (s_vm == stopped)
#endif
inline resume() { s_by_hand = false; if :: IS_OURS -> s_vm = running :: else fi }
inline end_waiting() { if :: t_vm == incoming || t_vm == loaded -> t_vm = gone :: else fi }
/* QemuTargetHost::EndOrphan cannot tell a guest that somebody paused from one that was loaded. */
inline end_orphan() { if :: t_vm == incoming || t_vm == loaded || t_vm == paused -> t_vm = gone :: else fi }
/* TargetConversation::AbortHandover, its last step. */
inline write_never_ran() { seen_never_ran = seen_never_ran || t_seen; t_record = never_ran }

/* TargetConversation::End, of a conversation before the order to run: only what was not seen to run never ran. */
#ifdef SEEN_YET_NEVER_RAN
#define SEEN false
#else
#define SEEN t_seen
#endif
inline end_in_hand() {
  if
  :: SEEN && t_vm == running -> t_record = ran_untold; t_open = true
  :: SEEN && t_vm != running -> t_record = ran_untold
  :: !SEEN -> if :: t_vm == running -> t_vm = gone; t_by_hand = false :: else fi; end_waiting(); write_never_ran()
  fi;
  t_at = idle
}

#ifdef ANSWER_TOLD
#define ANSWERS_TOLD true
#else
#define ANSWERS_TOLD false
#endif
#define ONE_LIVES (s_vm == running || t_vm == running || t_vm == paused || elsewhere)
#define T_IN_HAND (t_at == ready || t_at == may_give_up)   /* a conversation before the order to run */
#ifdef WORD_UNASKED
#define HERE_FITS true
#define THERE_FITS true
#else
#define HERE_FITS ((t_up && t_at == idle && t_vm != running && (t_record == never_ran || t_record == told_to_run || t_record == waiting || (t_record == none && t_vm == gone))) || (!t_up && t_record == none && t_vm == gone))
#define THERE_FITS ((t_up && t_at == idle && (t_record == ran || t_vm == running)) || (!t_up && t_vm == running))
#endif
#ifdef NO_TOMBSTONE
#define NOTED true
#else
#define NOTED s_left
#endif
#ifdef KILL_BY_STATE
#define IS_ENDED (s_vm == stopped)
#else
#define IS_ENDED (s_vm == stopped || s_vm == running)
#endif
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
       if :: T_IN_HAND -> end_in_hand() :: else fi;
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
  :: atomic { s_up && s_at == calling_off && IS_OURS -> s_vm = running }
  :: atomic { s_up && s_at == calling_off && !IS_OURS -> to_target(Abort); s_record = none; s_at = idle;
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
       if :: T_IN_HAND -> end_in_hand() :: else fi;
#endif
       if
       :: t_record == ran || (t_record == told_to_run && ANSWERS_TOLD) -> s_record = moved; s_at = idle
       :: t_record == waiting && t_vm != running ->
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
  /* SourceSession::HoldStill, Recovery::HoldGivenUp */
#ifndef NO_HOLD
  :: atomic { s_up && s_record == given_up && s_vm == running && s_by_hand -> s_vm = stopped; s_by_hand = false }
#endif
  /* Recovery::DecideOne, SourceSession::TakeWord: the other host is asked, then the record is read again. */
  :: atomic { s_up && s_word == here && s_at == doubt && s_record == given_up && HERE_FITS ->
       s_word = none; s_open = false;
       if                                                   /* TargetService::EndForGood */
       :: t_up && (t_record == told_to_run || t_record == waiting) && t_vm != running ->
            end_orphan(); t_record = never_ran; t_open = false
       :: else
       fi;
       s_record = taken_back; s_at = idle }
  :: atomic { s_up && s_word == there && s_at == doubt && s_record == given_up && THERE_FITS ->
       s_word = none; s_open = false; s_record = moved; s_at = idle }
#ifdef STALE_WORD
  :: atomic { s_up && s_word == there && s_record != given_up && s_at == idle -> s_word = none; s_record = moved }
#else
  :: atomic { s_up && s_word != none && s_record != given_up -> s_word = none }
#endif
  /* Recovery::Resume, SourceSession::ResumeHere */
  :: atomic { s_up && s_at == idle && (s_record == preparing || s_record == taken_back) -> resume(); s_record = none }
  /* Recovery::Moved, SourceSession::Settle */
#ifndef NO_TOMBSTONE
  :: atomic { s_up && s_at == idle && s_record == moved && !s_left -> s_left = true }
#endif
  :: atomic { s_up && s_at == idle && s_record == moved && NOTED && IS_ENDED -> s_vm = gone; s_by_hand = false }
  :: atomic { s_up && s_at == idle && s_record == moved && NOTED && (s_vm == gone || s_vm == left) -> s_record = none }
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
       :: t_vm != running && t_vm != paused && t_record != ran_untold ->
            t_vm = incoming; t_record = waiting; t_at = ready; t_seen = false; to_source(Ready)
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
  :: atomic { t_up && t_at == told && (t_vm == loaded || t_vm == running) ->
       t_vm = running; t_by_hand = false; t_at = does_run }
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
  :: atomic { t_up && t_at == refused && t_vm != running -> end_waiting(); t_record = never_ran; to_source(NeverRan);
       t_at = idle; linked = false }
  :: atomic { t_up && t_at == refused && t_vm == running -> end_in_hand(); linked = false }
#endif
  :: atomic { t_up && t_at == does_run -> to_source(Running); t_record = ran; t_at = idle }
  /* TargetConversation::AbortHandover: on the source's word, or at the connection's end (Conversation::End). */
  :: atomic { t_up && T_IN_HAND && to_t?[Abort] -> to_t?m; t_at = aborting;
       /* The source has it, whatever ran here meanwhile. */
       if :: t_vm == running -> t_vm = gone; t_by_hand = false :: else fi }
  :: atomic { t_up && T_IN_HAND && !linked && empty(to_t) -> t_at = aborting }
  :: atomic { t_up && T_IN_HAND -> t_at = aborting; linked = false }     /* silence, a bad message, a dead QEMU */
  :: atomic { t_up && t_at == aborting && (t_vm == incoming || t_vm == loaded) -> t_vm = gone }
  :: atomic { t_up && t_at == aborting && t_vm != incoming && t_vm != loaded ->
       end_in_hand(); linked = false }
  /* What comes when there is no conversation for it. */
  :: atomic { t_up && t_at == idle && (to_t?[Load] || to_t?[Run] || to_t?[Abort]) -> to_t?m }
  /* Recovery::SettleWaiting and SettleToldToRun, before presyncd listens and again and again. */
  :: atomic { t_up && t_at == idle && t_record == waiting && !t_open && (!linked || !S_LIVE) ->
       if
       :: t_vm == running -> t_open = true
       :: else -> end_waiting(); t_record = never_ran
       fi }
  /* Recovery::Pass reads, and acts a while later: Recovery::Act reads again under a claim on the name. */
  :: atomic { t_up && reads < 1 && t_read == none && t_record != none -> reads++; t_read = t_record }
  :: atomic { t_up && t_at == idle && t_read == waiting ->
       t_read = none;
#ifdef STALE_PASS
       if :: t_vm != running -> end_orphan(); t_record = never_ran :: else fi
#endif
     }
  :: atomic { t_up && t_at == idle && t_read != none && t_read != waiting -> t_read = none }
  /* Recovery::ApplyAtTarget: `ran` of a guest that runs here, though nobody told it to, and that its source gave up. */
  :: atomic { t_up && t_open && t_vm == running && t_by_hand && s_vm != running && acts < ACTS &&
              s_record == given_up && (s_at == doubt || !s_up) ->
       acts++; t_record = ran; t_open = false; t_by_hand = false }
  :: atomic { t_up && t_at == idle && t_record == told_to_run && !t_open ->
       if
       :: t_vm == loaded || t_vm == paused -> t_vm = running; t_record = ran
       :: t_vm == running -> t_record = ran; t_by_hand = false
       :: else -> t_open = true
       fi }
  :: atomic { !t_up ->                                 /* Daemon::Create: the first pass, then it listens */
       if
       :: t_record == waiting && t_vm != running -> end_waiting(); t_record = never_ran
       :: else
       fi;
       if :: t_vm == incoming -> t_vm = gone :: else fi;  /* QemuTargetHost::EndWaitingLeftovers */
       t_read = none;
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
       if :: t_vm != running || t_by_hand -> guest_killed = true :: else fi;
       s_vm = gone }
  :: atomic { !calm && kills < KILLS && t_vm != gone -> kills++;
       if :: t_vm == running || t_vm == paused || t_record == told_to_run -> guest_killed = true :: else fi;
       t_vm = gone }
  /* `cont` at the source that gave it up, and at the QEMU that waits, before it is told to run */
  :: atomic { !calm && acts < ACTS && s_vm == stopped && s_record == given_up ->
       acts++; s_vm = running; s_by_hand = true }
  :: atomic { !calm && acts < ACTS && t_vm == loaded && t_record == waiting ->
       acts++; t_vm = running; t_by_hand = true; t_seen = t_up }
  /* QEMU's own migration to a third host */
  :: atomic { !calm && acts < ACTS && s_vm == running && !s_by_hand && t_vm != running && t_vm != paused &&
              s_record != given_up && s_record != moved ->
       acts++; s_vm = left; elsewhere = true }
  :: atomic { !calm && acts < ACTS && t_vm == running && !t_by_hand && t_record == ran -> acts++; t_vm = paused }
  /* A service starts it again, which asks first: CheckMayStart. */
  :: atomic { !calm && acts < ACTS && s_vm == gone && s_at == idle && !s_left && !elsewhere &&
              s_record != given_up && s_record != moved ->
       acts++; s_vm = running }
  /* A person types a word, which is taken up some time later. */
  :: atomic { !calm && acts < ACTS && s_record == given_up && s_word == none ->
       acts++; if :: s_word = here :: s_word = there fi }
  :: atomic { !calm && losses < LOSSES && !t_up && t_record != none -> losses++; t_record = none }
  od
}

/* Invariant 5, at every moment; and 4: nothing runs that was not given up. */
active proctype Watch() {
end:
  do
  /* Two run, and no person made that so a moment ago. */
  :: atomic { s_vm == running && t_vm == running && !s_by_hand && !t_by_hand -> assert(false) }
  :: atomic { elsewhere && (s_vm == running || t_vm == running) && !t_by_hand -> assert(false) }
  :: atomic { seen_never_ran -> assert(false) }
  :: atomic { t_vm == running && s_record == none && s_at == idle && s_vm == stopped -> assert(false) }
  od
}

/* When nothing more happens, one guest runs; or it was killed; or it stands still at the source, where it can be
 * resumed, and a person is told. */
active proctype Verdict() {
end:
  atomic { timeout ->
    assert(!(s_vm == running && t_vm == running) || (t_by_hand && (t_open || losses > 0)));  /* ... or unnoticed, for ever */
#ifdef NO_PERSON
    assert(ONE_LIVES || guest_killed);
    assert(!s_open && !t_open)
#else
    assert(ONE_LIVES || guest_killed || (s_open && s_vm == stopped))
#endif
  }
}
