/* The smallest guest that keeps writing: a Multiboot kernel without an operating system, for QEMU inside an
 * emulated machine, where Linux would take minutes to boot.
 *
 * Fills its memory once, then changes a word of every second page, lap after lap, with REST turns of an empty
 * loop after each page. What it has to show for itself is at physical address 2 MiB: laps made, since it
 * booted; so whoever looks at the file behind its RAM sees it run.
 */
        .set MAGIC, 0x1badb002
        .set FLAGS, 2                   /* wants mem_upper, Multiboot Specification 0.6.96, 3.1.2 */
        .set LAPS, 0x200000
        .set FIRST, 0x400000            /* written from here on */
        .set KEEP_OFF, 0x100000         /* ... to this far below the end, where firmware keeps its tables */

        .section .text
        .long MAGIC, FLAGS, -(MAGIC + FLAGS)
        .globl _start
_start: cli
        movl 8(%ebx), %edx              /* mem_upper: KiB above 1 MiB */
        shll $10, %edx
        addl $(0x100000 - KEEP_OFF), %edx
        movl $FIRST, %edi
fill:   movl %edi, (%edi)
        addl $512, %edi
        cmpl %edx, %edi
        jb fill
        xorl %eax, %eax
lap:    incl %eax
        movl %eax, LAPS
        movl $FIRST, %edi
page:   addl %eax, 64(%edi)
        movl $REST, %ecx
rest:   decl %ecx
        jns rest
        addl $8192, %edi
        cmpl %edx, %edi
        jb page
        jmp lap
